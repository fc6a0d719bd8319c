"""A page that shows what the mixers do."""
