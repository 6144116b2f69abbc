"""The method as functions of plain tensors: schedule, layout of triplets, importance, allocation, penalty."""
