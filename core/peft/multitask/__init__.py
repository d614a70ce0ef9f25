"""Methods for several tasks on one backbone at once."""
