"""Does a teacher object where a failed response leaves the successful ones?

rollouts -> what student and teacher say, context by context (scoring) -> points and shares (figures) -> files (output)
"""
