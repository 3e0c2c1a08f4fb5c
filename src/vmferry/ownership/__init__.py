"""One owner for each machine and its images: the record, where it is kept, and who may run.

:mod:`.protocol` has the rules, :mod:`.store` is what keeps the record, :mod:`.engine` an engine's
part.
"""
