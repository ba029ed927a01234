"""Clusters: adapters to Ray and others."""
