"""Postcopy: a machine runs at the destination, and its memory follows."""
