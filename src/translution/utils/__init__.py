"""Small helpers that every floor uses: files, messages, measuring."""
