"""Modules on hidden states."""
