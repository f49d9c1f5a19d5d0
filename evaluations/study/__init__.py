"""Every method on one data set, from one teacher, at equal images seen."""
