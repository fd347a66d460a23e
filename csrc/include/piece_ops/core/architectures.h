// architectures.h - does a device run what a build holds? CMake's list of CUDA architectures, read.
#pragma once

#include <cctype>
#include <cstdlib>
#include <string>
#include <vector>

namespace piece_ops {

// "90", "90a" or "100f", as machine code (sm_) or as PTX (compute_).
struct Architecture {
  int number;   // 10 * major + minor
  char suffix;  // 'a': this device only; 'f': its major version; 0: later ones too
  bool is_ptx;

  std::string name() const {
    std::string text = (is_ptx ? "compute_" : "sm_") + std::to_string(number);
    if (suffix != 0) text += suffix;
    return text;
  }

  // Machine code runs on its own major version from its minor on; PTX on anything later.
  bool runs_on(int capability) const {
    if (suffix == 'a') return capability == number;
    const bool same_major = capability / 10 == number / 10;
    return capability >= number && (same_major || (is_ptx && suffix == 0));
  }
};

// "80-real;90a-real;120" as CMake has it: -real machine code, -virtual PTX, neither: both. What is
// no number ("native", "all": CMakeLists.txt resolves them) is nothing.
inline std::vector<Architecture> parse_architectures(const std::string& list) {
  std::vector<Architecture> found;
  for (size_t begin = 0; begin < list.size();) {
    size_t end = list.find_first_of(";,", begin);
    if (end == std::string::npos) end = list.size();
    const std::string item = list.substr(begin, end - begin);
    begin = end + 1;
    const int number = std::atoi(item.c_str());
    if (number <= 0) continue;
    const size_t digits = item.find_first_not_of("0123456789");
    const bool has_suffix = digits != std::string::npos && std::isalpha(item[digits]) != 0;
    const char suffix = has_suffix ? item[digits] : '\0';
    const bool only_ptx = item.find("-virtual") != std::string::npos;
    const bool only_code = item.find("-real") != std::string::npos;
    if (!only_ptx) found.push_back({number, suffix, false});
    if (!only_code) found.push_back({number, suffix, true});
  }
  return found;
}

inline bool any_runs_on(const std::vector<Architecture>& built, int capability) {
  for (const Architecture& architecture : built) {
    if (architecture.runs_on(capability)) return true;
  }
  return false;
}

}  // namespace piece_ops
