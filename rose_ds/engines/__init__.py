"""Where a model runs. Each engine knows how passes are pulled back into its gradient, which slice of which named
parameter lies on this rank, and over which ranks it is split. None knows a loss, a divergence or a mask."""
