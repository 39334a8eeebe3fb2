"""Answers of bases and tuned models: bodies, names, engines, and the forms that OpenAI's clients read."""
