"""Running a torch network on meta tensors and writing down what each operator does to rows and columns."""
