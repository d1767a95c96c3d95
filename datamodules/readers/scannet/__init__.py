"""ScanNet in the layouts it is used in, behind one interface."""
