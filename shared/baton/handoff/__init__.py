"""Moving a prompt's KV cache from the tier that computed it to the tier that continues it.

`wire` says what a chunk is and checks it, `sender` streams a slot out under credits, `receiver` writes it into another
slot and says when it is whole. Knows the pool's layout and the protos; no engine, no service.
"""
