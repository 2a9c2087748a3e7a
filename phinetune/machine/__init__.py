"""What there is of memory and disk, and what machine this is; nothing of it knows of models."""
