"""JLML person re-identification (Li, Zhu, Gong, IJCAI 2017) in JAX and Flax."""
