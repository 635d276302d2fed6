"""What the runs of a store say about methods: choices, statistics, tables, a chart and a page."""
