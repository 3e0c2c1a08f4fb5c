"""A guest moves again and again, in every way there is, and must never find anything wrong."""
