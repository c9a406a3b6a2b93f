"""Other projects' engines, measured the way Baton is. Each runs in an environment of its own; none is a dependency."""
