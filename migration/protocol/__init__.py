"""The protocol of a move, apart from Ray, vLLM, asyncio and clocks: messages, states, timing.

The two machines (`source`, `destination`) say what follows from what; `migration/source.py` and
`migration/destination.py` carry it out. docs/migration.md draws both.
"""
