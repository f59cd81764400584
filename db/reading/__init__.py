"""Reading rows: pages of a model, one row with all that belongs to it, a team, a hero's history."""
