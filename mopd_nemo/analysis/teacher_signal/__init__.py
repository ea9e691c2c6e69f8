"""Agreement of a teacher's scores with the verifier, under different contexts (paper section 5.3, appendix A).

rollouts -> contexts (conditions) -> scores (scoring) -> six metrics, in three readings (metrics) -> files (output)
"""

RESULT_FILE = "teacher_signal.json"
