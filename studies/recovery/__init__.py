"""Study: how well the set aggregation finds planted correspondences, by scale, noise, schedule and prior."""
