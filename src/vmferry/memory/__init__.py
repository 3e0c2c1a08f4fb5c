"""Guest memory: RAM blocks on memfd, and logs of the pages that were written."""
