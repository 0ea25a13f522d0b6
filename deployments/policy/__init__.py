"""Pure scheduling policy: plain data in, decisions out.

Nothing here imports Ray, vLLM or asyncio; clocks and randomness are arguments. The same functions
run in the Scheduler deployment, in the routers and in the simulator.
"""
