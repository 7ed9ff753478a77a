# A package, so that processes which tests start find these modules: torch-fidelity installs a package `tests` as well.
