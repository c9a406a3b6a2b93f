"""The engine on a CUDA device: pages instead of slots, graphs instead of launches, one step ahead of its results."""
