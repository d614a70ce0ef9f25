"""Methods on disk: our own folders, Hugging Face peft's, and patches."""
