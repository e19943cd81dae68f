"""The machine: meshes and the sharding table, processes, chips."""
