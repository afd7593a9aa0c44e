"""gnbench's plugins for Hydra, which looks for them below `hydra_plugins`."""
