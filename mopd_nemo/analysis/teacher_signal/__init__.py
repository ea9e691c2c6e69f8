"""Agreement of a teacher's scores with the verifier, by what the teacher reads (paper section 5.3, appendix A).

rollouts -> contexts (conditions) -> scores (scoring) -> six metrics per prompt (metrics) -> three readings (table)
"""
