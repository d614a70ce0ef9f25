"""Hugging Face peft's adapter folders, read and written without importing peft."""
