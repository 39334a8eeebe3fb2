"""A run in the forms that other software takes: PEFT, transformers, llama.cpp, Ollama, vLLM."""
