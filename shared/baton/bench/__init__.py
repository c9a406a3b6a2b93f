"""The load generator behind `baton bench`.

Definitions, fixed once: TTFT is request sent to first token message received. ITL is the gap between token messages.
TPOT is (end-to-end - TTFT) / (tokens - 1). Goodput is requests per second that meet every objective. Open-loop load
counts latency from the *scheduled* send time, so that a slow server cannot hide by slowing its clients down. The
generator measures its own lag, and a result with too much of it is refused.
"""
