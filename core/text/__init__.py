"""Text for all domains: tokenizers, texts as ids, encoders and language models. Nothing here is imported before it is
needed: transformers takes seconds."""
