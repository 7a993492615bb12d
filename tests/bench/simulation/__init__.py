"""A simulation of clusters that no machine here could hold: discrete events around the product's own code.

    python -m tests.bench.simulation SCENARIO... [--figures docs/figures]

virtual_time   an asyncio loop whose clock jumps from timer to timer
traces         requests with the statistics of published traces
engine         a replica: continuous batching at measured step times, and its prefix cache
choices        the choice of a replica: the product's request router, and what it is compared with
cell           routers with the product's admission, replicas that start and end
scaling        policies for the number of replicas
fetching       an artifact on its way to many nodes at once
figures        what a run gave; plots draws it
scenarios      what is run
overload       the load of `tests/bench/overload.py`, which was measured
"""
