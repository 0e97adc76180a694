//! Writing compressed clusters.
