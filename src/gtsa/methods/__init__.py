"""Self-supervised methods: one file is one idea, in the order of its paper."""
