"""Several runs side by side: which setting gives what, over seeds, with what uncertainty and at what cost."""
