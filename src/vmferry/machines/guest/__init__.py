"""The guest that comes with vmferry: it walks over memory, rewrites it, and tells when it is wrong.

A vCPU walks over its share of the working set, again and again.  Before it rewrites a page it
verifies it: the page must hold its own number, the sequence number of the walk before, and the
sums of its content.  So a page that was lost, is stale, or was torn between two states shows
itself.  The counters that say what is to be expected are kept in registers, in SSE registers and
in memory, and have to agree, as they do not where processors and memory are of different instants.

What a page holds is told in :mod:`.pages`, where everything lies in :mod:`.layout`, and what the
guest says on its serial port in :mod:`.console`.
"""
