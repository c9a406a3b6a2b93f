"""What prefill and decode have in common: a front that owns one engine process and tells the routers about it."""
