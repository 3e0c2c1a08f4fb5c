"""A saved machine on disk: a directory of plain files, written whole or not at all."""
