from hypothesis import settings

settings.register_profile("tandem", deadline=None)  # a busy machine is no failure
settings.load_profile("tandem")
