"""One module for each kind of classifier or image model: a subclass of `ClassifierInfo` or `ImageModel`.

`guidegen.models.classifiers.opening` finds the modules by itself. A module imports torch and transformers only inside
functions, since opening a classifier must not wait for them.
"""
