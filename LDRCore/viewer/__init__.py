"""An interactive page of one result, shown by NiiVue in a browser without any network."""
