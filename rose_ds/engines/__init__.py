"""One file an engine. Each knows how to get two gradients of a micro-batch, which slice of which named parameter lies
on this rank, and over which ranks it is split. None knows the paper's mathematics."""
