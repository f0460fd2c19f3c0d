"""Growing networks: lifecycle, blueprints, hosts with slots, and the population engine that trains them."""
