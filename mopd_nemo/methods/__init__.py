"""Training methods, one small file a method. `mopd_nemo.config.plugins.METHODS` has their names."""
