"""Small helpers for every part of the library: files, tables, words and measurements."""
