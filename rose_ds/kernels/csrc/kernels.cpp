// ROSE's step on CPUs: counts of risks, masks, and masked AdamW, over many pieces of memory in one call each.
//
// Exact: what rose_ds.core computes with torch, to the last bit. No operation may be contracted or re-associated (built
// with -ffp-contract=off and never with -ffast-math); where torch uses a fused multiply-add, this says std::fma. Every
// element is computed alike wherever it lies, so nothing depends on the number of threads or on how memory is cut up.

#include "masked_adamw.h"
#include "norms.h"
#include "risks.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  const std::vector<at::Tensor> none;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Risks>(m, "Risks")
      .def(py::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<double>, double,
                    bool, std::vector<at::Tensor>, double, std::vector<Draw>, std::vector<at::Tensor>, int64_t, bool>(),
           py::kw_only(), py::arg("grads"), py::arg("exp_avgs") = none, py::arg("alphas") = std::vector<double>(),
           py::arg("scale") = 1.0, py::arg("agreement") = false, py::arg("others") = none, py::arg("share") = 0.0,
           py::arg("draws") = std::vector<Draw>(), py::arg("masks") = none, py::arg("plane") = 0,
           py::arg("largest") = false)
      .def("histogram", &Risks::histogram, without_gil)
      .def("sample", &Risks::sample, without_gil)
      .def("zoom", &Risks::zoom, without_gil)
      .def("scan", [](Risks& risks, int64_t low, int64_t high) { return Risks::scan({&risks}, {low}, {high})[0]; },
           without_gil)
      .def_static("scan_together", &Risks::scan, without_gil)
      .def("mark", &Risks::mark, without_gil);
  m.def("adamw", &adamw, without_gil);
  m.def("squares", &squares, without_gil);
}
