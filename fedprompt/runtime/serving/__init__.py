"""The black-box model as a service over HTTP."""
