"""The fleet in one process under a virtual clock: real vLLM schedulers, llumlets and moves.

Only what lies between processes is replaced: Serve's calls, HTTP and the links take the time that
`Delays` says. An hour of a fleet passes in minutes, and is the same each time.
"""
