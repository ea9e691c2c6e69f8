"""Losses per response token: functions of logits and hidden states, no models.

`objectives` names what can be minimised and needs no torch, `reference` has the formulas, `token_loss` is the one
function that engines call.

Shape suffixes: T response tokens (any number of responses laid end to end), V vocabulary, K support, H hidden size.
"""
